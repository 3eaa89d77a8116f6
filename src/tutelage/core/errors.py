"""The one exception that means a user's mistake.

Public names: `UserError`.
"""


class UserError(ValueError):
    """Options, files or data that cannot work; the message says what was found, what was expected and what to do.

    The command line prints it as one line and exits with code 2. Any other exception is a bug of tutelage.
    """
