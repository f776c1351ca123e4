"""Pages that hold all they need: no script, style or picture from elsewhere, and text of the user's only escaped."""
import html

STYLE = 'body { font-family: sans-serif; margin: 1em 2em; color: #222; background: #fff } h2 { font-size: 1em }'


def escape(text: str) -> str:
  """Text as HTML, fit for an attribute in double quotes too."""
  return html.escape(text, quote=True)


def make(title: str, body: str, style: str = '') -> str:
  """A page; the title is plain text, body and style are HTML and CSS."""
  return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
          f'<style>{STYLE}\n{style}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n')
