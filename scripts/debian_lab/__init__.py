"""A real Debian with systemd, PostgreSQL, the guest agent and a judge of its own, for proofs."""
