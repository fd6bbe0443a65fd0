"""Guards: readers and limits for files, texts and programs that may be damaged or hostile."""
