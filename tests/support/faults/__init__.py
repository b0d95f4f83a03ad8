"""The fault run: a real gateway and engine under steady traffic, while one part after another is broken.

    make faults

Every answer is judged, by its receipt and by its words; nothing may be left behind, and the audit log must be
whole. The last line is one JSON object. A short version runs in `make test` (`tests/proxy/test_faults.py`).
"""
