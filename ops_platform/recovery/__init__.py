"""Restore, and the proof that it works. The face of the room:

`restore.restore` brings a target back to a moment, `verify.verify` restores into a sandbox and looks at the data,
`records` keeps and reads the scorecards, `sandbox` is a restored server that can hurt nobody, `gates` looks at one
and `findings` notes what was seen, `model` holds the nouns.
"""
