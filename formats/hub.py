"""The Hugging Face hub: whether a folder may be sent there, and sending it."""

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from recipe import UsageError
from runtime import first_lines


def check_push(repo, token=None):
    """Raises UsageError unless this user may write a repository of that name, as far as that shows before."""
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UsageError(f"--push_to_hub {repo}: is no name of a repository ({e}); give OWNER/NAME") from e
    try:
        user = HfApi().whoami(token)
    except LocalTokenNotFoundError as e:
        raise UsageError(f"--push_to_hub {repo}: there is no token of the hub here; `hf auth login` asks for one") from e
    except Exception as e:  # whatever the network or the hub's client raise
        raise UsageError(f"--push_to_hub {repo}: the hub does not take this token, or cannot be reached ({first_lines(e)})") from e
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(f"--push_to_hub {repo}: this token may only read; make one that may write, and give it to `hf auth login`")
    owner = repo.partition("/")[0] if "/" in repo else user["name"]
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    if owner not in owners:
        raise UsageError(f"--push_to_hub {repo}: this token is of {', '.join(owners)}, not of {owner}; give a repository of theirs")


def create_repo(repo, token=None, private=None):
    """Make a repository if there is none of that name: its full name."""
    return HfApi().create_repo(repo, token=token, private=private, exist_ok=True).repo_id


def upload(folder, repo, token=None, **arguments):
    """Send all files of a folder: what HfApi.upload_folder returns."""
    return HfApi().upload_folder(repo_id=repo, folder_path=str(folder), token=token, **arguments)


def push(folder, repo):
    """Send a finished folder: the repository's full name.  Raises OSError that says how to send it again."""
    try:
        full_name = create_repo(repo)
        upload(folder, full_name)
    except Exception as e:  # whatever the hub, the network or its client raise: the folder is there
        raise OSError(f"--push_to_hub {repo}: not sent ({first_lines(e)}); {folder} is complete: hf upload {repo} {folder}") from e
    return full_name
