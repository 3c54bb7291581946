"""`python -m rarefy`, also for `python -m torch.distributed.run -m rarefy run ...`."""

from rarefy.cli import main

if __name__ == "__main__":
    main()
