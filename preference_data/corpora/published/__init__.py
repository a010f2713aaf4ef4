"""Published corpora, one file each: `download` fetches a corpus, `read` parses its layout."""
