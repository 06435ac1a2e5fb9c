# Lab opens on the map, with the whole repository at the left; it asks nothing and calls nobody.
c = get_config()  # noqa: F821
c.LabApp.default_url = "/lab/tree/nbs/index.ipynb"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
