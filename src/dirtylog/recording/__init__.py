"""Recordings: the rounds of a log in one SQLite file. docs/recording.md describes the format."""
