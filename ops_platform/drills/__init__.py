"""Recovery tried out, and in earnest: runbooks as graphs of typed steps, held by an engine that survives every kill. The face of the room:

`begin` rules on a drill and begins it, `engine` holds it and ends it, `store` keeps it, `loader` reads runbooks, `registry` is where
steps are registered, `overdue` says which drill is next, `forecast` how long a restore will take, `model` holds the nouns.
"""
