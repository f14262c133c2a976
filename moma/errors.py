"""The one error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: the message names the file, key or row at fault and the way out.

    The command line prints the message alone and exits with code 2; every other
    exception is a defect of the program and keeps its traceback.
    """
