"""The tuner: search spaces, measuring, and the database of what was found."""

DEFAULT_NAME = "tuning.db"  # of the database's file
