"""Creates, resumes and grows a cache, and commits its blocks."""
