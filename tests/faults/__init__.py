"""The fault catalogue as a corpus: a base file, a small mutation, the code and the words that must come of it."""
