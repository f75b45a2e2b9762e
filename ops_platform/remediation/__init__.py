"""Alerts and events turned into safe action: signals, rules, incidents, playbooks."""
