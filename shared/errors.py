"""The one exception a user is meant to read."""


class UserError(ValueError):
    """What is wrong and what to do about it, in one line. The command lines print it and exit with
    status 2.
    """
