"""What a policy is measured on: suites, their files and lists, local or remote."""
