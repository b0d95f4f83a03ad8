"""The fault run: a real gateway and engine under steady traffic, while one part after another is broken.

make faults

Every answer is judged by receipt and text; nothing may leak, and the audit log must be intact. The last line
is one JSON object. A short version runs in `make test` (`tests/proxy/test_faults.py`).
"""
