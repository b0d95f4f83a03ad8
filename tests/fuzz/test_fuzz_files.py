"""Files of unknown origin: a parser accepts them, or refuses them with its own error."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hostile_bytes import corpus, fuzzed, hostile
from hypothesis import given

from interpretops.errors import PlanError, PolicyError
from interpretops.files.strict_yaml import parse_yaml
from interpretops.files.tensor_file import TensorFile
from interpretops.plan import read_plan
from interpretops.policy import policy_from_document
from interpretops.records.audit_chain import head_path, read_head, read_line, verify


def check_policy(data: bytes) -> None:
    """Read a policy; an error must be lines that each name the source."""
    refusal = ""
    try:
        policy = policy_from_document(parse_yaml(data, PolicyError, "p.yaml"), None)
    except PolicyError as error:
        refusal = str(error)
    assert refusal.startswith("p.yaml: ") or (not refusal and policy.interventions)


def check_tensors(data: bytes, folder: Path) -> None:
    """Each tensor of an accepted file has its stated shape; as a plan the file is valid or refused."""
    path = folder / "t.safetensors"
    path.write_bytes(data)
    refusal = "t.safetensors: "
    try:
        file = TensorFile(path, PolicyError)
        for name, entry in file.entries.items():
            assert file[name].shape == entry.shape
            assert np.asarray(file[name]).nbytes == entry.end - entry.start
            assert len(file.head(name, 16)) <= 16
    except PolicyError as error:
        refusal = str(error)
    assert "t.safetensors: " in refusal
    with suppress(PlanError):
        read_plan(data)


def sealed(body: bytes) -> bytes:
    """A line with a valid hash: anyone who can write the log can produce such lines."""
    return body + b',"hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}'


def check_audit(data: bytes, folder: Path) -> None:
    """A line is a record or a fault; a log of such lines is intact only if its head and numbers match."""
    for line in (data, sealed(data)):
        record = read_line(line)
        assert record is None or isinstance(record["seq"], int)
    log = folder / "audit.jsonl"
    log.write_bytes(data)
    head_path(log).write_bytes(data)
    assert read_head(log) is None or data.strip().startswith(b"{")
    assert isinstance(verify(log).faults, list)
    log.write_bytes(b"".join(sealed(line) + b"\n" for line in data.splitlines()))
    assert isinstance(verify(log).faults, list)


@pytest.mark.parametrize("data", corpus("policy_yaml"))
def test_corpus_policies_are_accepted_or_refused(data: bytes) -> None:
    """Every input that once caused a failure is handled."""
    check_policy(data)


@fuzzed
@given(data=hostile("policy_yaml"))
def test_policy_is_read_or_refused_in_one_error(data: bytes) -> None:
    """For any bytes the policy reader only raises an error that names the file."""
    check_policy(data)


@pytest.mark.parametrize("data", corpus("tensor_header"))
def test_corpus_tensor_files_are_accepted_or_refused(data: bytes, tmp_path: Path) -> None:
    """Every input that once caused a failure is handled."""
    check_tensors(data, tmp_path)


@fuzzed
@given(data=hostile("tensor_header"))
def test_tensor_file_is_read_or_refused_in_one_error(data: bytes, tmp_path: Path) -> None:
    """No header causes another error, or a tensor that differs from its header."""
    check_tensors(data, tmp_path)


@pytest.mark.parametrize("data", corpus("audit_line"))
def test_corpus_audit_lines_are_records_or_faults(data: bytes, tmp_path: Path) -> None:
    """Every input that once caused a failure is handled."""
    check_audit(data, tmp_path)


@fuzzed
@given(data=hostile("audit_line"))
def test_audit_line_is_a_record_or_a_fault(data: bytes, tmp_path: Path) -> None:
    """No line makes verification raise, even with a valid hash."""
    check_audit(data, tmp_path)


def test_deep_line_with_a_right_hash_is_a_fault(tmp_path: Path) -> None:
    """Nesting beyond the parser's limit cannot crash verification, in the log or in its head."""
    deep = b'{"seq":1,"prev":' + b"[" * 100_000
    log = tmp_path / "audit.jsonl"
    log.write_bytes(sealed(deep) + b"\n")
    head_path(log).write_bytes(b"[" * 4096)
    assert read_line(sealed(deep)) is None
    assert any("hash" in fault for fault in verify(log).faults)


@pytest.mark.parametrize("value", ["Infinity", "1e400", "2.5", "true", '"1"', "null", "-1"])
@pytest.mark.parametrize("field", ["shape", "data_offsets"])
def test_non_integer_numbers_in_a_tensor_header_are_refused(tmp_path: Path, field: str, value: str) -> None:
    """Non-integer numbers are refused; they used to crash, or pass until used."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"t": entry | {field: ["?", 4] if field == "data_offsets" else ["?"]}})
    data = header.replace('"?"', value).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with pytest.raises(
        PolicyError, match=r"t.safetensors: (header unreadable|tensor 't' (has|does not fit))"
    ):
        TensorFile(path, PolicyError)
