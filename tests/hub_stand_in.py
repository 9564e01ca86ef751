"""What tests upload to instead of the hub; the fixture `hub` puts it in the hub's place."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace


def done():
    answer = Future()
    answer.set_result(SimpleNamespace(oid="1", commit_url=""))
    return answer


class Hub:
    """Keeps what is uploaded, as (repository, {name: content}), and answers uploads in the background with `answer()`."""

    def __init__(self):
        self.uploads = []
        self.private = {}
        self.answer = done

    def create_repo(self, repo_id, *, private=None, **options):
        name = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        self.private[name] = private
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, run_as_future=False, ignore_patterns=(), **options):
        from huggingface_hub.utils import filter_repo_objects

        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        names = filter_repo_objects(names, ignore_patterns=list(ignore_patterns))
        self.uploads.append((repo_id, {name: (Path(folder_path) / name).read_bytes() for name in names}))
        return self.answer() if run_as_future else done().result()
