"""Files: folders on a disk or in a bucket, files that appear when they are whole, the cache."""
