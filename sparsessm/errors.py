"""The one exception that is the user's to mend, not ours."""


class InputError(ValueError):
    """What the user gave is unusable.

    The message is one line that says what to do; main.py prints it and leaves with exit code 2.
    """
