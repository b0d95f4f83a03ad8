"""Which policy a request gets, and how policy files become revisions that engines hold."""
