"""Asks service.py or service_fixed.py, as one of its clients would."""

import sys
import urllib.error
import urllib.request

try:
    with urllib.request.urlopen("http://127.0.0.1:7100/", timeout=5) as answer:
        print(answer.read().decode().strip())
except (OSError, urllib.error.URLError) as error:
    sys.exit(f"the service does not work: {error}")
