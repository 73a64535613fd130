// Light or dark as the system says, or as was chosen. Runs before anything is shown, so that nothing flashes.
const theme = {
  key: 'setu.theme',
  get chosen() {
    const theme = localStorage.getItem(this.key);
    return theme === 'light' || theme === 'dark' ? theme : 'system';
  },
  set chosen(theme) {
    if (theme === 'system') localStorage.removeItem(this.key);
    else localStorage.setItem(this.key, theme);
    this.apply();
  },
  apply() {
    const { chosen } = this;
    if (chosen === 'system') delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    document.dispatchEvent(new Event('setu-theme'));
  },
};
theme.apply();
globalThis.setuTheme = theme;
