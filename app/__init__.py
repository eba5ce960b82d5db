"""The demo: outlines of SFT, DPO and TKPO side by side. `python app/main.py` starts it."""
