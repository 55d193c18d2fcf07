"""The Space: `timm-spa app`, served by the Hub."""
from timm_spa.explain import app

if __name__ == '__main__':
    app.serve(host='0.0.0.0')
