"""Plain, slow references of the families that Transformers has no class for.

One module a family, written from its authors' code, paper and other people's ports, and not from
ours. Each has `build(config)`, which gives a module whose parameters have the names of the
published checkpoints and whose `forward(inputs)` gives the logits (tokens, vocab) of a whole
sequence; and `encode(folder, messages, images, audio, options)`, which makes those inputs of a
conversation: "input_ids" (1, tokens) and what the towers take. What sources say where they differ
stands at the place in question.
"""
