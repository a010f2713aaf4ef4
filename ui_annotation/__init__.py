"""Annotation in the browser with Argilla: projects go in, judgements come out."""


class AnnotationError(Exception):
    """An error that a person can mend: the message names the thing, the place and the next command."""
