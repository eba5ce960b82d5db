"""The one exception that is meant for the person at the keyboard."""


class TKPOError(Exception):
    """Bad input: the message says what was wrong, where (file, record number) and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
