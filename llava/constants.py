"""The constants that users of LLaVA import, and the one exception that means "the input is at fault"."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15
LOGDIR = "."

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that names the value and the remedy.

    Commands print it alone and exit with code 2; any other exception is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        """Take the message; what it quotes of other errors is put on the one line."""
        super().__init__(" ".join(message.split()))


class PromptTooLong(InputError):
    """A prompt has more tokens, its images included, than the model takes."""


class OutOfReach(InputError):
    """A method with these fields cannot come down to the retention ratio asked for, on this image and model."""
