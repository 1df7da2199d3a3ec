"""The relay: a process of its own that durable requests travel through, so that others keep Python out of their way.

Envoy sends it what the picker has picked for and admitted; it calls the picked replica, passes messages on as they are,
and remembers what a next replica needs: the prompt's tokens and those that the client has. Where the replica dies it
asks the proxy for another one and goes on there; where the replica drains it does so before that one ends.

- `journal` — what a client has of an answer, and what is to be done where its replica breaks off (pure)
- `session` — one request's way
- `replicas` — channels to replicas
- `servicer` — the calls that it takes
- `settings`, `__main__` — the process
"""
