"""Published corpora: `cards.yaml` says what to fetch, and a file for each reads its publisher's layout."""
