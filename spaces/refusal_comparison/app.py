"""The Space: all it does is in `agl_trl.space`; the variables BASE_MODEL and ADAPTER say what it compares."""

from agl_trl.space import build_app, launch_options


app = build_app()

if __name__ == "__main__":
    app.launch(**launch_options())
