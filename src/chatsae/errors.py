"""The one exception whose text is written for the person at the keyboard."""


class UserError(Exception):
    """Something a user can mend: bad input, a wrong key, a missing file.

    The message names the file, the field and what was expected. The command line prints it without a traceback
    and exits with code 2.
    """
