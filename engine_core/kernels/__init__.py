"""One folder per operation: `api` (validation, choice), `reference` (the definition), implementations."""
