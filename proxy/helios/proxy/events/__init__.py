"""What happens to workers and replicas, for operators who watch it.

`record` says what an event is and which actions of the core are events, `log` keeps the last of them by number. Both
know no I/O and no clock. Changes of models are the registry's to tell.
"""
