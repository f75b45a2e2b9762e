"""Alerts and events turned into safe action: signals, rules, incidents, playbooks. The face of the room:

`store` keeps incidents and the pause switch, `guards` are what may refuse an action beside those of `actions`, `model` holds the nouns.
"""
