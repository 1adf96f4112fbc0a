"""Runs behind a URI: recorded into a spool on this machine, uploaded from there."""
