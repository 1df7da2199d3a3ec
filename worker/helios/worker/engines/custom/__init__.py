"""A user's own Python class as the engine of a model.

Two kinds of classes: subclasses of ``litserve.LitAPI``, which run unchanged, and classes that implement Helios's own
``Engine`` protocol. They are named by ``class``: ``module:Class`` on the worker's path, or the name of an entry point
in the group ``helios.engines``.

How a LitAPI's hooks are used:

- ``setup(device)`` runs once, in the thread that later runs ``predict``; an error in it is the reason of the failed
  start. Before it, ``model_path`` of the instance is set to the directory with the model's files.
- ``decode_request(request)`` gets the JSON object of the OpenAI call as a dict: ``model``, ``messages`` (or ``prompt``)
  and whatever else the client sent. Typed gRPC calls arrive in the same form.
- ``predict`` and ``encode_response`` run as in LitServe: values, or with ``stream=True`` generators; ``batch`` and
  ``unbatch`` with ``max_batch_size > 1``; coroutines with ``enable_async=True``; a parameter named ``context`` gets the
  dict of the request.
- What ``encode_response`` gives is the answer, or with ``stream=True`` each part of it:

  - a str (or bytes): the text;
  - a dict with ``choices``: OpenAI's own document, passed on as it is;
  - a dict with ``content`` or ``text``, a str: that text (``usage`` in it is the count of tokens);
  - a pydantic model: as the dict that it dumps;
  - anything else that is JSON: its JSON as the text.

- Clients may stream or not, whatever the API does: parts are joined, a whole answer is one part. ``stop`` ends texts.
- An ``HTTPException`` keeps its status; any other exception is an error 500 that names the hook and the exception.
- Without ``usage`` each part counts as one token. There is no tokenizer: Tokenize is UNIMPLEMENTED.

A ``LitSpec`` has no place here, since Helios makes OpenAI's shapes itself, and neither have LitLoops of one's own.
"""
