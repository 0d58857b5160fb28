"""The demo model: a small Qwen3 trained on Python's own documentation.

Read in this order: ``rest.py`` (reST to plain text) -> ``corpus.py`` (what is learned, what is held out) ->
``dialogues.py`` (documentation to questions and answers) -> ``tokenizer.py`` -> ``train.py`` -> ``sample.py``.
"""
