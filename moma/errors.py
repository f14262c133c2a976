"""The one error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input: the message names the file, key or row at fault and the way out.

    The command line prints the message alone and exits with code 2; every other
    exception is a defect of the program and keeps its traceback.
    """


class SharedError(UserError):
    """A `UserError` that all ranks of a job raise alike: the first one tells it for all."""


class LostRankError(Exception):
    """Another process of the job ended or does not answer; the job can begin again.

    The command line prints the message and exits with code 1, on which launchers restart the job.
    """


class StoppedError(Exception):
    """A signal ended the work early; what was done is saved, and the same command goes on.

    The command line exits with `CODE`, "try again later" in sysexits.h, on which job scripts put
    the job back into the queue.
    """

    CODE = 75
