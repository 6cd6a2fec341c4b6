"""Engines: functions that take orders to clients and bring back replies."""
