{
  description = "Describes every photo of an Immich library with a vision model on your own machine";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" ];
      module = builtins.readFile ./immich_analyze.py;

      package =
        pkgs:
        pkgs.python3Packages.buildPythonApplication {
          pname = "immich-analyze";
          version = builtins.head (builtins.elemAt (builtins.split "__version__ = \"([^\"]+)\"" module) 1);
          pyproject = true;
          src = ./.;
          build-system = [ pkgs.python3Packages.hatchling ];
          dependencies = with pkgs.python3Packages; [
            av
            configargparse
            jinja2
            pillow
            psycopg2
            requests
            tqdm
            watchdog
          ];
          # The same module out of a wheel for those who have no libpq.
          pythonRemoveDeps = [ "psycopg2-binary" ];
          # They want PostgreSQL and llama.cpp out of wheels.
          doCheck = false;
          pythonImportsCheck = [ "immich_analyze" ];
          postInstall = ''
            install -D -m 444 immich-analyze.service -t $out/lib/systemd/system
            substituteInPlace $out/lib/systemd/system/immich-analyze.service \
              --replace-fail /opt/immich-analyze/bin/ $out/bin/
          '';
          meta = {
            description = "Describes every photo of an Immich library";
            license = pkgs.lib.licenses.mit;
            mainProgram = "immich-analyze";
            platforms = systems;
          };
        };
    in
    {
      packages = nixpkgs.lib.genAttrs systems (system: {
        default = package nixpkgs.legacyPackages.${system};
      });

      nixosModules.default =
        { config, lib, pkgs, ... }:
        let
          cfg = config.services.immich-analyze;
          variable = name: "IMMICH_ANALYZE_" + lib.toUpper (builtins.replaceStrings [ "-" ] [ "_" ] name);
          # The settings that have a variable, by the README's table of them.
          rows = builtins.split "\n[|] `--([a-z-]+)`[^|]*[|] `IMMICH_[A-Z_]+` [|]" (
            builtins.readFile ./README.md
          );
          known = builtins.concatMap (row: if builtins.isList row then row else [ ]) rows;
          unknown = builtins.filter (name: !(builtins.elem name known)) (builtins.attrNames cfg.settings);
          text =
            value:
            if builtins.isBool value then
              lib.boolToString value
            else if builtins.isList value then
              builtins.concatStringsSep "," value
            else
              toString value;
          secret =
            what:
            lib.mkOption {
              type = lib.types.nullOr lib.types.path;
              default = null;
              description = "File with ${what}. Only root need be able to read it.";
            };
        in
        {
          options.services.immich-analyze = {
            enable = lib.mkEnableOption "descriptions for the photos of Immich";
            package = lib.mkOption {
              type = lib.types.package;
              default = self.packages.${pkgs.stdenv.hostPlatform.system}.default;
              defaultText = lib.literalMD "the package of this flake";
              description = "The package to run.";
            };
            settings = lib.mkOption {
              type = with lib.types; attrsOf (oneOf [ bool int float str path (listOf str) ]);
              default = { };
              example = {
                immich-api-url = "http://localhost:2283";
                model-name = "qwen3-vl:4b-instruct-q4_K_M";
              };
              description = ''
                Settings by the names of the flags, without their dashes; an unknown one is an error.
                No secrets: all users of the machine can read these. The mode is combined.
              '';
            };
            environmentFile = lib.mkOption {
              type = lib.types.nullOr lib.types.path;
              default = null;
              description = "File with more variables, such as Immich's DB_USERNAME.";
            };
            credentials = {
              immich-api-key = secret "Immich's API keys";
              db-password = secret "the password of the database";
              model-key = secret "the key for the model hosts";
            };
          };

          # Everything else, what shuts the service in too, is said by immich-analyze.service.
          config = lib.mkIf cfg.enable {
            assertions = [
              {
                assertion = unknown == [ ];
                message = "services.immich-analyze.settings: unknown: ${toString unknown}";
              }
              {
                assertion =
                  cfg.environmentFile != null
                  || builtins.any (name: cfg.settings ? ${name}) [
                    "immich-api-url"
                    "postgres-url"
                    "postgres-url-file"
                  ];
                message = ''
                  services.immich-analyze: where Immich is, say settings.immich-api-url,
                  settings.postgres-url or the DB_* variables of environmentFile.
                '';
              }
            ];
            systemd.packages = [ cfg.package ];
            systemd.services.immich-analyze = {
              wantedBy = [ "multi-user.target" ];
              environment = lib.mapAttrs' (name: value: {
                name = variable name;
                value = text value;
              }) cfg.settings;
              serviceConfig = {
                EnvironmentFile = lib.optional (cfg.environmentFile != null) (toString cfg.environmentFile);
                LoadCredential = lib.mapAttrsToList (name: file: "${name}:${toString file}") (
                  lib.filterAttrs (_: file: file != null) cfg.credentials
                );
              };
            };
          };
        };
    };
}
