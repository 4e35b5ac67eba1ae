"""Batches: one plan, many domains; retention, schedules and reports.

plan        what is to be done: a TOML file as attrs values; schema: the same as a JSON schema
select      which domains (pure)
slots       which of them next, within the limits (pure)
retention   which snapshots go (pure)
timing      durations, windows, cron (pure)
store       the durable record: an interrupted batch goes on where it was
runner      runs a batch
report      JSON, JUnit XML and an HTML page with a timeline
schedule    runs plans when they are due
rehearsal   runs a plan on the simulated driver, at full scale
"""
