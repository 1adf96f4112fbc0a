from diagnostics.app.page import render

render()
