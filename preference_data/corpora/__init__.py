"""One file per corpus, two verbs: `download(dir)` fetches it, `prepare(...)` turns it into records."""
