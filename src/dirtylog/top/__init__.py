"""A live view of a log, for ``dirtylog top``: what is shown, how it is laid out in text, and the screen."""
