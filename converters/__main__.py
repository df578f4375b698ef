"""``python -m mindspeed_wan_converters``: the same as ``mm-convert``."""

from mindspeed_wan_converters.cli import main

if __name__ == "__main__":
    main()
