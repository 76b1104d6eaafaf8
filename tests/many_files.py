"""Makes and cleans up folders and files in a process of its own, beside others that do the same."""

from contextlib import suppress

from melt_files import partial_folder, remove_dead, replace_text, staged


def make_many(parent, number, queue) -> None:
    try:
        for turn in range(40):
            with staged(parent / f"{number}-{turn}") as folder:
                (folder / "file").write_text("whole")
            remove_dead(parent)
            if number == 0:  # the folder itself comes and goes
                for _ in range(3):
                    with partial_folder(parent / "inner", "x") as place:
                        (place / "file").touch()
                    with suppress(OSError):
                        (parent / "inner").rmdir()
            else:
                replace_text(parent / "inner" / "text", str(number) * 5000)
                text = (parent / "inner" / "text").read_text()
                assert len(text) == 5000
                assert len(set(text)) == 1
        queue.put("well")
    except BaseException as error:
        queue.put(repr(error))
        raise
