"""What is done with domains and snapshots, one story a file."""
