"""Schedules and prediction types, in one place: forward process, targets and their conversions."""
