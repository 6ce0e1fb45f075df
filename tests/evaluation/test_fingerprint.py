import hashlib

from milora.evaluation.fingerprint import run_fingerprint


def test_files_of_earlier_runs_stay_recognised() -> None:
    # By hand, as in existing files: JSON with sorted keys, then the model's fingerprint.
    expected = hashlib.blake2b(b'{"a": [1, null], "b": {"c": "x"}}0123', digest_size=8).hexdigest()
    assert run_fingerprint({"b": {"c": "x"}, "a": (1, None)}, "0123") == expected
